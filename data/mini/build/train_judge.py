"""Train the judge: ``python data/mini/build/train_judge.py``.

An eye that had no part in making what it judges.

A small convolutional network, unlike the other encoders, trained on renders of another seed; it
names nouns, count, setting and medium. It sees blurred and noisy renders too, so that it judges
what is drawn and not how sharply. Writes timm's folder format to ``data/mini/judge``.
"""

import common
from corpus import Corpus
from train_encoder import SIZES, Classifier, export, labelled, objective, report

LABELS = {**SIZES, "count": 4}  # counts 1 to 3; 0 never occurs
NETWORK = ("resnet10t", {"stem_width": 16, "channels": (32, 64, 128, 256)})
SCALE = (
    2  # ResNets halve pictures twice before their first stage, and 64 pixels have nothing to spare
)
FOLDER = common.MINI / "judge"


def main():
    """Train, report, export."""
    import timm

    chosen = common.options(__doc__, renders=98_304, epochs=2, lr=2e-3, batch=64)
    corpus = Corpus(chosen.renders, seed=common.JUDGES_SEED)
    data = labelled(corpus, LABELS)
    common.seeded("judge", chosen.seed)
    architecture, options = NETWORK
    model = Classifier(
        timm.create_model(architecture, num_classes=sum(LABELS.values()), **options),
        LABELS,
        SCALE,
        soft=True,
    )
    settings = common.config(chosen, batch_size=chosen.batch, lr=chosen.lr)
    common.train(
        "judge",
        model,
        data,
        settings,
        objective,
        {"network": NETWORK, "soft": True, "corpus seed": common.JUDGES_SEED},
    )
    print(report(model, data))
    export(model.cpu().eval(), FOLDER, architecture, options)


if __name__ == "__main__":
    main()
