"""Training: phases, step, run, compile, parallel, evaluate, checkpoint. Knows no model, no loss."""
