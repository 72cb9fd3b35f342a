from srpo_jax.inputs import Encoded, Inputs, VisionInputs, batch_inputs, pad_to  # noqa: F401
