"""The reference libraries, each in an environment of its own: to be served, and to be compared with our scorers.

An adapter, `NAME.py`, is run by that environment's Python, where this package does not exist; it imports the standard
library, numpy, Pillow and the reference library, and has

    random_weights(path)    write a checkpoint in the published layout, at the true size, the same one each time
    load(weights)           a function of (images, prompts, metadata) to named arrays, among them `score` [B] where the
                            library gives one, and whatever else is worth comparing

`worker.py` runs it there, `reward.py` makes a reward of that process, which our reward server serves.
`requirements/NAME.txt` says what is installed; `ours.py` has the same arrays from our scorer.
"""
