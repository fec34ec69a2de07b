"""Training a model of several modules over a topology, on megatron-core and without Lightning."""
