"""Training on diffusers, peft, accelerate and transformers; never on the host."""
