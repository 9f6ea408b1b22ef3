"""Where the nodes of the DCO workflows lie, and what their notes say; see draw_workflows.py."""

NOTE_SIZES = {
    "dco_train_subject": (420, 215),
    "dco_train_style": (420, 215),
    "dco_reward_guidance": (340, 180),
    "dco_subject_in_style": (340, 130),
}
NOTES = {
    "dco_train_subject": """**Teach the model your subject**

1. Drop 3 to 10 pictures on the Training Picture nodes. Copy a node for more, delete one for fewer.
2. Describe each picture completely, background and style too, with `<dog>` where the subject is named. \
Below it, the same in ordinary words.
3. Choose your checkpoint and press Run.

The LoRA goes to *models/loras*, the new word to *models/embeddings*, both as *my_dog*. \
Press R, then open the template *dco_reward_guidance*.""",
    "dco_train_style": """**Teach the model a style**

1. Drop one picture in the style that you like.
2. Describe what it shows, and end with a name for the style, such as \
`in flat cartoon illustration style`. No new word is learned.
3. Choose your checkpoint and press Run.

The LoRA goes to *models/loras* as *my_style*. Press R, then name the style in your prompts in the same words.""",
    "dco_reward_guidance": """**Your subject, anywhere**

1. Choose the checkpoint that you trained on, and your LoRA.
2. Write the prompt twice: with your word `<dog>`, and in ordinary words.
3. *reward_scale* sets how close the picture comes to the subject, *text_scale* how close to the prompt.""",
    "dco_subject_in_style": """**Your subject in your style**

1. Choose the checkpoint, the LoRA of the subject, and after it the LoRA of the style.
2. *reward_scale* is the strength of the subject, *reward_scale_2* that of the style.""",
}
NOTE = 0
LAYOUTS: dict[str, list[tuple[str, list[list[int]]]]] = {
    "dco_train_subject": [
        ("Pictures and base model", [[1, 4], [2, 5], [3, 6, 7]]),
        ("Training", [[8]]),
        ("Result", [[10, 9, NOTE]]),
    ],
    "dco_train_style": [
        ("Pictures and base model", [[1, 2, 3]]),
        ("Training", [[4]]),
        ("Result", [[6, 5, NOTE]]),
    ],
    "dco_reward_guidance": [
        ("Model", [[1, 2, NOTE]]),
        ("Prompts", [[3, 4, 5]]),
        ("Sampling", [[6, 7, 8, 9, 10]]),
        ("Result", [[11, 12, 13]]),
    ],
    "dco_subject_in_style": [
        ("Model", [[1, 2, 3, NOTE]]),
        ("Prompts", [[4, 5, 6, 7]]),
        ("Sampling", [[8, 9]]),
        ("Result", [[10, 11]]),
    ],
}
