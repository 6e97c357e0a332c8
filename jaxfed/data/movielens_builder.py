"""The tensorflow-datasets builder of MovieLens-100K. Importing this registers it and imports tfds (about a second)."""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from jaxfed.data.movielens_files import raw_files, read_raw


class JaxfedMl100k(tfds.core.GeneratorBasedBuilder):
    """One example per user: columns of its rows and their places in the file."""

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
        rows, titles, genres, users = read_raw(files)
        for number, user in enumerate(np.unique(rows[:, 0])):
            place = np.flatnonzero(rows[:, 0] == user)
            _, item, rating, time = rows[place].T
            columns = {"row": place, "item": item, "rating": rating.astype(np.float32), "time": time}
            columns["title"] = [titles.get(str(each), str(each)) for each in item]
            columns["genres"] = [genres.get(str(each), "") for each in item]
            yield number, {"user": str(user), **users[str(user)], **columns}
