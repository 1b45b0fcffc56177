"""Users: who they are, what they ban, and what stands for them in training and drawing."""
