"""One module a command of `clip-deploy`: the docstring is its help, add_arguments what it takes, run what it does."""
