"""Figure 3: training loss and test accuracy on the way, just before and just after distortions.

The two trainings of Figure 2 at about 4×. A distortion costs accuracy at first; by the end of
training the network stands where it costs little.
"""

import pandas as pd

from experiments.fig2 import ACCURACY, conventional, deeptwist, pair
from experiments.page import Report, Results, Table, count_holds, is_higher, number
from experiments.plots import Curve, Points, draw
from experiments.profiles import Network, Profile, Run

PLACE = "Figure 3"
NETWORK: Network = "resnet32"
NEEDS_EPOCHS = True
CLAIM = (
    "The gap between accuracy before and after a distortion closes, and DeepTwist ends above "
    "conventional fine-tuning."
)
TUNED = "conventional fine-tuning"


def runs(profile: Profile) -> dict[str, Run]:
    """Return DeepTwist and conventional fine-tuning at one size."""
    return pair(profile, profile.reference)


def report(results: Results, profile: Profile) -> Report:
    """Return loss and accuracy over epochs, and the gap that distortions leave."""
    names = deeptwist(profile.reference), conventional(profile.reference)
    learnt, tuned = [results.course(name) for name in names]
    distortions = distortions_of(results, names[0])
    if "test_accuracy_before" in distortions:
        distortions = distortions.dropna(subset="test_accuracy_before")
    before, after = (
        points(distortions, f"test_accuracy_{when}", 100) for when in ("before", "after")
    )
    losses = [
        Curve("DeepTwist", points(learnt, "train_loss"), 0),
        Curve(TUNED, points(tuned, "train_loss"), 1, dashed=True),
    ]
    accuracies = [
        Curve("just before a distortion", before, 0, line=False),
        Curve("just after it", after, 0, dashed=True),
        Curve(TUNED, points(tuned, "accuracy", 100), 1, dashed=True),
    ]
    y = "training loss, mean over the epoch"
    figures = draw("loss", "Training loss", losses, x="epoch", y=y)
    title = "Test accuracy around distortions"
    figures += draw("accuracy", title, accuracies, x="epoch", y=ACCURACY)
    gaps = pd.Series([ours[1] - other[1] for ours, other in zip(before, after, strict=True)])
    middle = len(gaps) // 2
    first, last = (
        float(half.mean()) if middle else None for half in (gaps[:middle], gaps[middle:])
    )
    last_losses = [
        number(float(each["train_loss"].iloc[-1]) if len(each) else None, 3)
        for each in (learnt, tuned)
    ]
    rows = [
        ["training loss, last epoch", *last_losses],
        ["test accuracy at the end, %", *map(results.shown, names)],
        ["before − after a distortion, first half, points", number(first), ""],
        ["before − after a distortion, second half, points", number(last), ""],
    ]
    images = results.of(names[0]).get("logged_images", pd.Series(dtype=int)).dropna()
    notes = [
        count_holds("The gap that a distortion leaves closes", [is_higher(first, last)]),
        f"At the end DeepTwist is {results.difference(*names)} points from conventional.",
        *[f"Around distortions: on {n} images spread over the test split." for n in images],
        "The paper prints no numbers of this figure.",
    ]
    table = Table(f"Tucker {profile.reference}", ["", "DeepTwist", "conventional"], rows)
    return Report([table], figures, notes)


def points(table: pd.DataFrame, column: str, factor: float = 1) -> Points:
    """Return (epoch, value) of a run's epochs or distortions."""
    known = table.dropna(subset=column) if column in table else table[:0]
    return [(x, factor * y) for x, y in zip(known["epoch"], known.get(column, []), strict=True)]


def distortions_of(results: Results, label: str) -> pd.DataFrame:
    """Return a run's distortions with their epochs, without one that follows another at once."""
    distortions = results.course(label, "distortions").drop_duplicates("step")
    epochs = results.course(label)
    length = epochs["step"].iloc[-1] / len(epochs) if len(epochs) else 1
    return distortions.assign(epoch=distortions["step"] / length)
