"""The host's client of the agent in the guest."""
