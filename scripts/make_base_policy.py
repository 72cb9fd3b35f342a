"""Makes the embedded base policy: a small Qwen2.5-VL trained from scratch on the world's imperfect demonstrations.

python scripts/make_base_policy.py --workdir=runs/base --output=srpo_jax/assets/base_policy

One seeded command, resumable, about 25 minutes on two cores. The policy's card, README.md beside the weights, says what
came out.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags
from transformers import Qwen2VLImageProcessorPil

from srpo_jax import cli
from srpo_jax import config as configs
from srpo_jax.data.world.demonstrations import Demonstrations
from srpo_jax.data.world.tokenizer import build_tokenizer
from srpo_jax.models.config import ModelConfig, TextConfig, VisionConfig
from srpo_jax.models.policy import Policy, init_policy
from srpo_jax.models.processor import Processor
from srpo_jax.training.data import DemonstrationTrees
from srpo_jax.training.loop import train
from srpo_jax.training.workdir import open_workdir

CONFIG = config_flags.DEFINE_config_file("config", "configs/base.py", "How to train it.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where to keep the run; the same command resumes it.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder for the policy in Hugging Face's format.", required=True)


def random_policy(config) -> Policy:
    """The untrained policy of the world: random weights, tokenizer and image processor."""
    tokenizer = build_tokenizer()
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    sizes = config.model.to_dict()
    image, video, start, end = (tokenizer.get_vocab()[name] for name in names)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    layout = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "text_config": {**ends, "tie_word_embeddings": sizes["text"]["tie_word_embeddings"]},
        "vision_config": {},
    }
    text, vision = TextConfig(**sizes["text"]), VisionConfig(**sizes["vision"])
    model = ModelConfig(text, vision, image, video, start, end, layout)
    images = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        min_pixels=config.model.min_pixels,
        max_pixels=config.model.max_pixels,
    )
    return init_policy(model, Processor(tokenizer, images, model), config.seed)


def main(_):
    config = CONFIG.value
    run, mesh = configs.run_config(config), configs.build_mesh(config)
    configs.check_batch(run, mesh)
    demonstrations = Demonstrations(config.data.seed, configs.build_difficulty(config), config.data.n)
    workdir = open_workdir(WORKDIR.value, config)
    policy = random_policy(config)
    params = train(policy, DemonstrationTrees(demonstrations, policy.processor), None, run, workdir, mesh)
    policy.save(Path(OUTPUT.value), jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    print(f"wrote the policy of step {run.updates} to {OUTPUT.value}; the run is in {workdir}")


if __name__ == "__main__":
    cli.run(main)
