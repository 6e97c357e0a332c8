"""The tensorflow-datasets builder of MovieLens-100K. Importing this registers it and imports tfds (about a second)."""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from jaxfed.data.sources.movielens_files import raw_files, user_examples


class JaxfedMl100k(tfds.core.GeneratorBasedBuilder):
    """One example per user, see `movielens_files.examples`."""

    VERSION = tfds.core.Version("1.1.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "u.data, u.item, u.user, or RecBole's ml-100k.inter, .item, .user"

    def _info(self):
        def many(dtype):
            return tfds.features.Tensor(shape=(None,), dtype=dtype)

        users = dict.fromkeys(("user", "age", "gender", "occupation", "zip_code"), np.str_)
        rows = {"row": np.int64, "item": np.int64, "rating": np.float32, "time": np.int64}
        rows |= {"title": np.str_, "genres": np.str_}
        features = tfds.features.FeaturesDict({**users, **{name: many(dtype) for name, dtype in rows.items()}})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(raw_files(Path(dl_manager.manual_dir)))}

    def _generate_examples(self, files):
        yield from enumerate(user_examples(files))
