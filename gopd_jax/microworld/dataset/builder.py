"""The TFDS builder of the microworld. Importing it imports tensorflow_datasets."""

import json

import tensorflow_datasets as tfds

from gopd_jax.microworld import dataset, tasks

SEED = 0


class Microworld(tfds.core.GeneratorBasedBuilder):
    """Rows alternate between the tasks; no problem occurs twice, within or across splits."""

    VERSION = tfds.core.Version(dataset.VERSION)
    RELEASE_NOTES = {dataset.VERSION: "Two- and three-step sums; filter, map and reduce a list."}

    def _info(self) -> tfds.core.DatasetInfo:
        texts = ("messages", "task", "answer", "verifier", "completion")
        return self.dataset_info_from_configs(
            description="Sums in steps and one-line Python functions, with verifiable answers.",
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in texts}),
            disable_shuffling=True,  # so that row i is the i-th generated one
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in dataset.ROWS}

    def _generate_examples(self, split: str):
        streams = [_distinct(task, split) for task in tasks.TASKS]
        for row in range(dataset.ROWS[split]):
            made = next(streams[row % len(streams)])
            yield (
                row,
                {
                    "messages": json.dumps(made.messages),
                    "task": made.task,
                    "answer": made.answer,
                    "verifier": made.verifier,
                    "completion": made.right,
                },
            )


def _distinct(task: str, split: str):
    """Problems of one stream without those that ask what an earlier one asked."""
    seen, index = set(), 0
    while True:
        made = tasks.problem(task, SEED, index, split=split)
        index += 1
        if made.key not in seen:
            seen.add(made.key)
            yield made
