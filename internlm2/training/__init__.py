"""Training: one loop (trainer.py) over one optimizer step (learner.py), in a folder that a run can continue from."""
