"""Linear attention: a state in place of all keys, at a cost that grows with the length."""
