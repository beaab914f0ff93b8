"""The stages of training: each is a data source and a loss for the one loop of training/trainer.py."""
