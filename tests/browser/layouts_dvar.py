"""Where the nodes of the workflows of DVAR's methods lie, and what their notes say; see draw_workflows.py."""

NOTE_SIZES = {
    "dvar_train_textual_inversion": (420, 250),
    "dvar_train_dreambooth": (420, 250),
    "dvar_train_custom_diffusion": (420, 270),
    "dvar_train_dco": (420, 270),
    "dvar_compare_rules": (420, 320),
}
_PICTURES = """1. Drop 3 to 10 pictures on the Training Picture nodes. Copy a node for more, delete one for fewer.
2. Choose your checkpoint and press Run."""
NOTES = {
    "dvar_train_textual_inversion": f"""**Teach the model a word**

{_PICTURES}

Training ends by itself when it has converged, mostly after a few hundred of its 6100 steps. *rows_per_token* is \
how much the word can hold.

The word goes to *models/embeddings* as *my_word*. Press R, then write `embedding:my_word` in any prompt, or use \
Load Learned Tokens and write `<dog>`.""",
    "dvar_train_dreambooth": f"""**Teach the model your subject with DreamBooth**

{_PICTURES}
3. *class_word* is what the subject is: dog, cat, chair.

Training ends by itself when it has converged, after 440 steps at the earliest and 1000 at the latest.

The LoRA goes to *models/loras*, the word `<dog>` to *models/embeddings*, both as *my_dreambooth*. Press R, then load \
both with Load DCO LoRA.""",
    "dvar_train_custom_diffusion": f"""**Teach the model your subject with Custom Diffusion**

{_PICTURES}
3. *class_prompt* is what the base model draws before the training, so that other dogs stay as they are.

Training ends by itself when it has converged, after 180 steps at the earliest and 500 at the latest.

The weights go to *models/custom_diffusion*, the word `<dog>` to *models/embeddings*, both as *my_custom_dog*. Press \
R, then load them with Load Custom Diffusion.""",
    "dvar_train_dco": """**Teach the model your subject with DCO, for as long as it takes**

1. Drop 3 to 10 pictures on the Training Picture nodes.
2. Describe each picture completely, with `<dog>` where the subject is named. Below it, the same in ordinary words.
3. Choose your checkpoint and press Run.

Training ends by itself when the loss on a fixed batch is flat, after 440 steps at the earliest and 2000 at the latest.

The files are called *my_dco_dog*. Press R, choose them in the template *dco_reward_guidance*.""",
    "dvar_compare_rules": f"""**Which rule stops when?**

{_PICTURES}
3. For the CLIP plateau, put the files of openai/clip-vit-base-patch32 into *models/scoring/clip-vit-base-patch32*.

The same DreamBooth training runs three times: with the short budget of DVAR's authors, until DVAR stops it, and until \
sampled pictures stop coming closer to yours. All three take the same course; the plot shows where each ended, the \
table with which loss.

CLIP Plateau's checks take longer than the training itself. Delete its trainer for a quick look.""",
}
NOTE = 0
_TRAINING = [
    ("Pictures and base model", [[1, 4], [2, 5], [3, 6, 7]]),
    ("Training", [[11, 8]]),
    ("Result", [[10, 9, NOTE]]),
]
LAYOUTS: dict[str, list[tuple[str, list[list[int]]]]] = {
    "dvar_train_textual_inversion": _TRAINING,
    "dvar_train_dreambooth": _TRAINING,
    "dvar_train_custom_diffusion": _TRAINING,
    "dvar_train_dco": _TRAINING,
    "dvar_compare_rules": [
        ("Pictures and base model", [[1, 4], [2, 5], [3, 6, 7]]),
        ("The same training with three rules", [[11, 8], [12, 9], [13, 10]]),
        ("Result", [[14, 15, NOTE], [17, 18, 19]]),
    ],
}
