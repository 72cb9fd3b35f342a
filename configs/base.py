"""The recipe of the embedded base policy: supervised, on the world's imperfect demonstrations.

python scripts/make_base_policy.py --workdir=runs/base --output=srpo_jax/assets/base_policy

Expected: 25 minutes on two cores, a loss of about 0.10 at the end; the policy's card tells what comes out.
"""

from srpo_jax.config import default_config

MODEL = {
    "text": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "rope_theta": 10_000.0,
        "mrope_section": (4, 6, 6),
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    },
    "vision": {
        "depth": 3,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": (2,),
        "out_hidden_size": 128,
    },
    "min_pixels": 28 * 28,
    "max_pixels": 112 * 112,
}


def get_config():
    config = default_config()
    with config.unlocked():
        config.model = MODEL
    config.data.n = 38_400
    config.pack.update(trunk=(144,), path=(112,), patches=(64,))
    config.batch.update(trees=32)
    config.compute.remat = "none"
    config.loss.weights.update(srpo=0.0, sft=1.0)
    config.optim.update(learning_rate=2e-3, warmup=60, weight_decay=0.01)
    config.rounds = 0
    config.updates = 1200
    config.checkpoint_every = 100
    return config
