"""What megatron-core needs to run without a GPU."""
