"""The customer's side: agents, and the collections that they run."""
