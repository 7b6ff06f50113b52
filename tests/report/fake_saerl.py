"""A make-believe SAERL experiment: every section of the page, with figures shaped like real ones."""

import math

import numpy as np

TOPICS = ["add", "subtract", "remainder", "largest", "count", "reverse", "sort", "word problem"]
CORRUPTIONS = ["clean", "wrong answer", "missing clause", "garbled text", "near-duplicate"]
ARMS = [
    {"name": "vanilla", "label": "vanilla", "role": "baseline", "about": "shuffled, nothing removed"},
    {"name": "full", "label": "SAERL, full", "role": "main", "about": "filter, moving difficulty band, clusters, mixing"},
    {"name": "published", "label": "published order", "role": "other", "about": "filter, clusters, strict easy to hard, mixing 0.125"},
    {"name": "filter", "label": "filter only", "role": "other"},
    {"name": "random_clusters", "label": "full, random clusters", "role": "control"},
    {"name": "tfidf", "label": "full, TF-IDF features", "role": "control"},
]
EVIL = '</script><script>window.pwned=1</script><img src="http://evil.example/x" onerror="window.pwned=2">'


def saerl_data(prompts=1200, seed=0, arms=6):
    rng = np.random.default_rng(seed)
    infos = ARMS[:arms]
    topic = rng.integers(0, 8, prompts)
    level = rng.integers(1, 6, prompts)
    corruption = rng.choice(5, prompts, p=[0.8, 0.06, 0.05, 0.05, 0.04])
    centre = np.stack([np.cos(np.arange(8) * 0.785), np.sin(np.arange(8) * 0.785)], 1) * 4
    xy = centre[topic] + rng.normal(size=(prompts, 2)) * 0.8 + level[:, None] * 0.2
    difficulty = np.clip(level / 6 + 0.12 * rng.normal(size=prompts), 0, 1)
    quality = rng.normal(np.array([0.8, 0.45, 0.3, -0.2, 0.7])[corruption], 0.22)
    text = [f"{TOPICS[t]} problem {i}: take {i % 90} and {i % 7}, then say the result ." for i, t in enumerate(topic)]
    text[3] = EVIL
    return {
        "title": "SAERL on the lab world",
        "subtitle": "SAERL, demo: one base model, 5 paired seeds, 120 GRPO steps",
        "headline": "Curated data was better: SAERL ends 3.4 points above shuffled data and reaches its final accuracy 30% sooner, "
        "nearly all of it from removing wrong answers; random clusters do as well as SAE clusters.",
        "facts": [
            {"label": "final accuracy against vanilla", "value": "+3.4 points", "detail": "95% interval 2.6 to 4.1"},
            {"label": "steps to vanilla’s final accuracy", "value": "84 of 120", "detail": "saved +30%"},
            {"label": "removed as low quality", "value": "18%", "detail": "81% of the wrong answers"},
            {"label": "difficulty against pass rate", "value": "0.81", "detail": "Spearman, held out"},
        ],
        "arms": infos,
        "curves": [curves(rng, infos)],
        "arms_tables": [arms_table(rng, infos)],
        "prompt_map": {
            "x": xy[:, 0],
            "y": xy[:, 1],
            "prompts": text,
            "method": "two principal components of the max-pooled SAE features",
            "fields": [
                {"name": "cluster", "kind": "category", "values": (topic * 2 + (level > 3)).tolist()},
                {"name": "topic", "kind": "category", "values": [TOPICS[t] for t in topic]},
                {"name": "difficulty", "kind": "number", "values": difficulty},
                {"name": "quality", "kind": "number", "values": quality},
                {"name": "kept", "kind": "category", "values": (quality > 0.35).tolist()},
                {"name": "corruption", "kind": "category", "values": [CORRUPTIONS[c] for c in corruption], "order": CORRUPTIONS},
            ],
        },
        "schedules": [schedule(rng, info["name"]) for info in infos],
        "calibration": calibration(rng),
        "quality": {
            "scores": {name: quality[corruption == i] for i, name in enumerate(CORRUPTIONS)},
            "cut": 0.35,
            "label": "quality score (log-probability of the gold answer)",
        },
        "signals": signals(),
        "rollouts": rollouts(infos),
        "features": features(rng),
        "config": {
            "seed": 0,
            "policy": {"d_model": 128, "n_layers": 4, "learning_rate": 1e-4},
            "grpo": {"steps": 120, "prompts": 32, "group": 8, "temperature": 1.0, "kl": None, "clip": [0.2, 0.28]},
            "sae": {"d_sae": 1024, "k": 16, "steps": 400, "hook": "blocks.2.resid_post"},
            "schedule": {"name": "full", "rho": 0.125, "clusters": 16},
        },
        "provenance": {
            "versions": {"jaxrl_llm": "0.1.0", "jax": "0.10.2", "flax": "0.12.8", "python": "3.11.7"},
            "seeds": [0, 1, 2, 3, 4],
            "stages": [
                {"name": "pre-training", "seconds": 212.0},
                {"name": "SAE", "seconds": 41.0},
                {"name": "curation", "seconds": 38.5},
                {"name": "GRPO, vanilla", "seconds": 96.0},
                {"name": "GRPO, full", "seconds": 94.2},
                {"name": "evaluation", "seconds": 12.1},
            ],
            "other": {"device": "cpu, 2 cores", "command": "jaxrl-llm saerl --config=configs/saerl.py:demo --workdir=runs/demo"},
        },
    }


def curves(rng, infos):
    steps = list(range(0, 121, 10))
    final = {"vanilla": 0.424, "full": 0.458, "published": 0.408, "filter": 0.433, "random_clusters": 0.452, "tfidf": 0.446}
    series, reach = [], {}
    for info in infos:
        name = info["name"]
        mean = (
            0.3 + (final[name] - 0.3) * (1 - np.exp(-np.array(steps) / 55)) / (1 - math.exp(-120 / 55)) + rng.normal(0, 0.0015, len(steps))
        )
        mean[0], mean[-1] = 0.3, final[name]
        series.append({"arm": name, "steps": steps, "mean": mean, "low": mean - 0.008, "high": mean + 0.008})
        reach[name] = next((s for s, v in zip(steps, mean, strict=True) if v >= final["vanilla"]), None)
    return {
        "title": "Pass@1 on 2,000 held-out problems, mean of 4 samples",
        "series": series,
        "band": "95% t-interval over 5 seeds",
        "target": {"arm": "vanilla", "value": final["vanilla"], "steps": reach},
    }


def arms_table(rng, infos):
    difference = {"full": 0.034, "published": -0.016, "filter": 0.009, "random_clusters": 0.028, "tfidf": 0.022}
    rows = [
        {
            "arm": "vanilla",
            "accuracy": {"value": 0.424, "low": 0.418, "high": 0.43},
            "steps_to_target": 120,
            "mixed_groups": 0.31,
            "seeds": 5,
        }
    ]
    for info in infos[1:]:
        d = difference[info["name"]]
        row = {"arm": info["name"], "accuracy": {"value": 0.424 + d, "low": 0.417 + d, "high": 0.431 + d}}
        row |= {"difference": {"value": d, "low": d - 0.011, "high": d + 0.011}, "mixed_groups": 0.3 + d * 3, "seeds": 5}
        row["per_level"] = {str(k): d * (1.6 - 0.3 * k) + rng.normal(0, 0.008) for k in range(1, 6)}
        row["steps_to_target"] = round(120 * (1 - d * 8)) if d > 0 else None
        if d > 0:
            row["steps_saved"] = {"value": d * 8, "low": d * 8 - 0.06, "high": d * 8 + 0.06}
        rows.append(row)
    return {
        "title": "Pool with 20% mixed corruption",
        "rows": rows,
        "note": "Paired by seed; intervals by bootstrap over seeds and problems.",
    }


def schedule(rng, arm):
    steps = list(range(120))
    drift = {"vanilla": 0.0, "published": 0.6, "full": 0.25}.get(arm, 0.25)
    middle = 0.5 + drift * (np.arange(120) / 120 - 0.5)
    quantiles = {
        str(q): np.clip(middle + z * (0.25 if drift == 0 else 0.12) + rng.normal(0, 0.01, 120), 0, 1)
        for q, z in ((10, -1.28), (25, -0.67), (50, 0.0), (75, 0.67), (90, 1.28))
    }
    counts = [rng.multinomial(32, np.ones(16) / 16 if drift == 0 else _peaked(step, 16, drift)) for step in steps]
    return {"arm": arm, "steps": steps, "quantiles": quantiles, "clusters": [str(i) for i in range(16)], "counts": counts}


def _peaked(step, clusters, drift):
    weight = np.exp(-((np.arange(clusters) - step / 120 * clusters) ** 2) / (4 / drift))
    return (weight + 0.01) / (weight + 0.01).sum()


def calibration(rng):
    def bins(slope):
        out = []
        for i in range(10):
            p = 0.05 + i / 10
            o = float(np.clip(0.5 + slope * (p - 0.5) + rng.normal(0, 0.02), 0, 1))
            out.append(
                {"predicted": p, "observed": o, "count": int(40 + 160 * math.exp(-((i - 6) ** 2) / 8)), "low": o - 0.04, "high": o + 0.04}
            )
        return out

    return {
        "series": [
            {"name": "SAE features", "bins": bins(0.94), "spearman": {"value": 0.81, "low": 0.79, "high": 0.83}},
            {"name": "length + TF-IDF", "bins": bins(0.6), "spearman": {"value": 0.74, "low": 0.71, "high": 0.77}},
            {"name": "dense activations", "bins": bins(0.9), "spearman": {"value": 0.82, "low": 0.8, "high": 0.84}},
        ],
        "note": "1,000 clean held-out problems, 16 samples each; 512 labels for the fit.",
    }


def signals():
    def row(name, values, half, kind="baseline"):
        cells = [None if v is None else {"value": v, "low": v - half, "high": v + half} for v in values]
        return {"name": name, "cells": cells, "kind": kind}

    return [
        {
            "title": "Diversity",
            "metric": "NMI of the clusters with the topic",
            "columns": ["K = 8", "K = 16", "K = 32"],
            "rows": [
                row("SAE", [0.77, 0.73, 0.65], 0.02, "ours"),
                row("random-init SAE", [0.71, 0.66, 0.61], 0.02),
                row("dense activations", [0.69, 0.64, 0.61], 0.02),
                row("TF-IDF", [0.77, 0.80, 0.74], 0.01),
            ],
        },
        {
            "title": "Difficulty",
            "metric": "Spearman with held-out pass rate",
            "columns": ["256 labels", "512 labels", "1,024 labels"],
            "rows": [
                row("SAE", [0.715, 0.81, 0.82], 0.02, "ours"),
                row("dense activations", [0.748, 0.821, 0.82], 0.02),
                row("length", [0.369, 0.369, 0.369], 0.05),
                row("length + TF-IDF", [0.396, 0.744, 0.77], 0.03),
                row("topic and level known", [0.843, 0.853, 0.858], 0.01, "bound"),
            ],
        },
        {
            "title": "Quality",
            "metric": "AUROC by kind of corruption",
            "columns": ["all", "wrong answer", "missing clause", "garbled text"],
            "rows": [
                row("SAE, prompt + answer", [0.68, 0.55, 0.73, 0.77], 0.03, "ours"),
                row("TF-IDF", [0.67, 0.55, 0.73, 0.75], 0.03),
                row("log-probability of the answer", [0.81, 0.76, 0.84, 0.81], 0.02),
                row("that + prompt perplexity", [0.87, 0.7, 0.915, None], 0.02),
            ],
        },
    ]


def rollouts(infos):
    items = []
    for i in range(20):
        prompt = EVIL if i == 1 else f"take {i} 7 4 , drop the last , then sort : what is first ?"
        responses = [
            {
                "arm": "base",
                "step": 0,
                "text": f"{EVIL if i == 1 else 7}",
                "status": "FAIL" if i % 3 else "PASS",
                "reason": "answer 7, wanted 4",
            }
        ]
        for j, info in enumerate(infos[:3]):
            ok = (i + j) % 4 != 0
            responses.append(
                {
                    "arm": info["name"],
                    "step": 120,
                    "text": f"first drop 4 , then sort : {i} 7 . the first is {i} .",
                    "status": "PASS" if ok else "FAIL",
                    "score": float(ok),
                }
            )
        items.append({"prompt": prompt, "answer": str(i), "tags": {"topic": TOPICS[i % 8], "level": i % 5 + 1}, "responses": responses})
    items[4]["responses"][1] |= {"status": "TIMEOUT", "reason": "the checker took over 2 s"}
    return items


def features(rng):
    out = []
    plain = [
        ("difficulty", "fires on the second operand of a remainder", 0.31),
        ("difficulty", "lists of three or fewer numbers", -0.22),
        ("quality", "a clause that ends without its number", -0.4),
        ("cluster 3", "the word reverse and what follows", 0.9),
    ]
    for i, (drives, about, effect) in enumerate(plain):
        contexts = []
        for j in range(4):
            tokens = ["what", "▁is", "▁", str(j), "7", "▁mod", "▁", str(i + 3), "▁then", "▁add", "▁4", "▁?"]
            contexts.append({"tokens": tokens, "activations": np.where(np.arange(12) % 5 == 2 + i % 3, rng.uniform(1, 6, 12), 0.0)})
        out.append(
            {"id": 400 + 37 * i, "drives": drives, "about": about, "effect": effect, "density": 0.02 + 0.03 * i, "contexts": contexts}
        )
    out[0]["contexts"][0]["tokens"][3] = "<img src=x onerror=alert(1)>"
    return out
