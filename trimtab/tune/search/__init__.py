"""The search of hyper-parameters: spaces, the journal that workers share, trials, and what they end with."""
