"""What every stage uses: settings, errors, target folders, result files, the machine, child processes."""
