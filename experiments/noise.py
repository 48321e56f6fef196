"""Sections 1 and 2: is it the direction of the distortions that helps, and their rarity?

Tucker at about 4×. DeepTwist is held against random noise that moves every layer as far at the
same steps, against projection to low rank at every step, and against a network that is decomposed
once, at the end. All take the same steps; conventional fine-tuning is shown beside them.
"""

from dataclasses import replace

from experiments.fig2 import ACCURACY, pair
from experiments.page import Report, Results, Table, count_holds
from experiments.profiles import Network, Profile, Run

PLACE = "Sections 1 and 2"
NETWORK: Network = "resnet32"
CLAIM = (
    "The low-rank direction of the distortions is what helps, and occasional ones beat constant "
    "ones."
)
HEADER = ["weights moved by", ACCURACY, "difference from DeepTwist"]
NOISE = "random noise of the same size at the same steps"
INTERVALS = {"decomposed once, at the end": 1_000_000, "projection at every step": 1}
CONTROLS = (NOISE, *INTERVALS)


def runs(profile: Profile) -> dict[str, Run]:
    """Return DeepTwist, conventional fine-tuning, and the controls."""
    size = profile.reference
    learnt = profile.run("deeptwist", "tucker", size)
    return {
        **pair(profile, size),
        NOISE: replace(
            learnt, name=learnt.name.replace("deeptwist", "random_noise"), has_noise=True
        ),
        **{
            name: profile.run("deeptwist", "tucker", size, interval=interval)
            for name, interval in INTERVALS.items()
        },
    }


def report(results: Results, profile: Profile) -> Report:
    """Return the accuracy of each, and its distance from DeepTwist."""
    deeptwist, tuned = pair(profile, profile.reference)
    rows = [
        [name, results.shown(name), results.difference(name, deeptwist)]
        for name in (deeptwist, *CONTROLS, tuned)
    ]
    higher = [results.is_higher(deeptwist, control) for control in CONTROLS]
    notes = [
        count_holds("DeepTwist is higher than a control", higher),
        "The paper prints no numbers of these.",
    ]
    return Report([Table(f"Tucker {profile.reference}", HEADER, rows)], notes=notes)
