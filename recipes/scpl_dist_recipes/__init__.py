"""Models and data sets of the experiments of arXiv 2602.00062, tables of texts, and the models of torchvision.

User code: it uses what `scpl_dist` documents for everybody, and is found by name through the entry points in
``pyproject.toml``. Copy a file to start a model or a data set of your own.
"""
