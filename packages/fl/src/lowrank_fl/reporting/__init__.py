"""Pages, pictures and tables about runs that lie in folders. Neither torch nor flwr is needed."""
