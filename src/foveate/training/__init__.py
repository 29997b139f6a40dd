"""What is trained on a frozen model: the loop, the conversations, the injection."""
