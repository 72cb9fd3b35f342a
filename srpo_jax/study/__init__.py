"""A study of training methods: who is compared, on what, how often, and what came out."""
