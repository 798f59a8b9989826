"""What LoRA-Dash costs where people train: a small LLaMA under transformers' Trainer, through every front end."""
