"""What the results say: rows, tables, the page, which target to ship, and the CI gate."""
