"""How fast a model decodes, dense and sparse, and what the machine's memory would allow."""
