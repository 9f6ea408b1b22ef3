"""Where the nodes of the workflows of DVAR's methods lie, and what their notes say; see draw_workflows.py."""

NOTE_SIZES = {"dvar_train_textual_inversion": (420, 250)}
NOTES = {
    "dvar_train_textual_inversion": """**Teach the model a word**

1. Drop 3 to 10 pictures on the Training Picture nodes. Copy a node for more, delete one for fewer.
2. Choose your checkpoint and press Run.

Training ends by itself when it has converged, mostly after a few hundred of its 6100 steps. *rows_per_token* is \
how much the word can hold.

The word goes to *models/embeddings* as *my_word*. Press R, then write `embedding:my_word` in any prompt, or use \
Load Learned Tokens and write `<dog>`.""",
}
NOTE = 0
LAYOUTS: dict[str, list[tuple[str, list[list[int]]]]] = {
    "dvar_train_textual_inversion": [
        ("Pictures and base model", [[1, 4], [2, 5], [3, 6, 7]]),
        ("Training", [[11, 8]]),
        ("Result", [[10, 9, NOTE]]),
    ],
}
