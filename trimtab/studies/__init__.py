"""Small experiments behind the Cards' claims, where no training run of a workload shows them.

A study is a function of a seed and options with defaults that returns finite metrics by name; the same seed gives the
same data, initialisation and order whatever the options. `trimtab reproduce NAME` runs it for both arms of a Card's
experiment on paired seeds.
"""
