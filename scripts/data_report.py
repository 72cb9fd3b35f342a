"""Reports the quality of a data set: data_report.html (one file, no script, no network) and data_report.json.

python scripts/data_report.py --data=DIR/records.jsonl [--out=DIR] [--model=CHECKPOINT [--tower]]

Counts, lengths, what question or picture alone give away, near-duplicates, pictures that cannot be opened, samples; with
--model the tokens of each record as this checkpoint sees them, and with --tower what its vision tower reads in the pictures.
"""

from pathlib import Path

from absl import flags
from tqdm import tqdm

from srpo_jax import cli
from srpo_jax.data.loaders import load_records, open_records
from srpo_jax.data.quality.measure import measure
from srpo_jax.data.quality.page import findings, render_page
from srpo_jax.data.rows import FORMATS, guess_format
from srpo_jax.files import write_json
from srpo_jax.models.hf import read_config
from srpo_jax.models.policy import load_policy
from srpo_jax.models.processor import Processor

DATA = flags.DEFINE_string("data", None, "A file, a folder, or the id of a data set on the hub.", required=True)
FORMAT = flags.DEFINE_enum("format", None, list(FORMATS), "Of --data; default: by its name.")
SPLIT = flags.DEFINE_string("split", "train", "Where --data has several; `meta.split` is reported whatever it is.")
IMAGES = flags.DEFINE_string("images", None, "What image names are relative to; default: the folder of --data.")
OUT = flags.DEFINE_string("out", None, "Folder for the report; default: beside --data.")
MODEL = flags.DEFINE_string("model", None, "Checkpoint folder, to count tokens.")
TOWER = flags.DEFINE_bool("tower", False, "Let the vision tower of --model read the pictures, too.")
MAX_BROKEN = flags.DEFINE_integer("max_broken", 0, "How many broken records may be left out, named in the log.")
SEED = flags.DEFINE_integer("seed", 0, "Of readers, bootstrap and samples.")


def main(_):
    if TOWER.value and MODEL.value is None:
        raise SystemExit("--tower reads with the vision tower of --model: name a checkpoint")
    form = FORMAT.value or guess_format(DATA.value)
    source = open_records(DATA.value, form, SPLIT.value, image_folder=IMAGES.value, max_broken=MAX_BROKEN.value)
    records = load_records(source)
    policy = processor = None
    if MODEL.value:
        policy = load_policy(MODEL.value) if TOWER.value else None
        processor = policy.processor if policy else Processor.load(MODEL.value, read_config(MODEL.value))
    measured = measure(
        records,
        processor=processor,
        policy=policy,
        seed=SEED.value,
        progress=lambda numbers: tqdm(numbers, desc="pictures", disable=None),
    )
    out = Path(OUT.value) if OUT.value else Path(DATA.value).parent
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "data_report.json", measured)
    page = render_page(measured, records, title=Path(DATA.value).name, seed=SEED.value)
    (out / "data_report.html").write_text(page, encoding="utf-8", errors="replace")
    for level, text in findings(measured):
        print(f"{level:8}{text}")
    print(out / "data_report.html")


if __name__ == "__main__":
    cli.run(main)
