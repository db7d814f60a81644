"""Numbers of others, which were not measured here."""

#: One-vs-rest AUROC as published, mean over all classes. Each has its own network and selection.
PUBLISHED = {
    "mnist": {
        "GT": 98.0,
        "P-KDGAN": 97.8,
        "MemAE": 97.5,
        "OCGAN": 97.5,
        "Deep SVDD": 94.8,
        "AnoGAN": 93.7,
        "IF": 92.3,
        "OC-SVM": 91.3,
    },
    "fashion_mnist": {"GT": 93.5, "Deep SVDD": 93.0, "AE": 82.0},
    "cifar10": {
        "GT": 86.0,
        "DROCC": 74.2,
        "P-KDGAN": 73.8,
        "OCGAN": 65.6,
        "Deep SVDD": 64.8,
        "OC-SVM": 64.8,
        "AnoGAN": 61.2,
        "MemAE": 60.9,
        "IF": 55.4,
    },
}
