"""Training: a loop (trainer.py) over optimizer steps (learner.py), whose state is kept in a folder so that it can continue."""
