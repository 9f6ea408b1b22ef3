"""The DCO recipe: LoRA and learned tokens trained to beat the frozen base on the user's pictures."""
