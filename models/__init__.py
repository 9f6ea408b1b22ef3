"""The personalization methods as tensor mathematics; nothing here knows a UNet class or the host."""
