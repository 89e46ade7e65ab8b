"""The rooms of the scheduler: what there is, what requests hold, forward, back and out, and who is alive (layer 1)."""
