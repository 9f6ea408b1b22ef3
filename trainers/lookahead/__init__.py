"""Training of the LCM-Lookahead face encoder."""
