"""The embedded world: pictures, requests and replies whose safety follows a rule (face: `srpo_jax.data.scenes`)."""
