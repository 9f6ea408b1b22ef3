"""Where the nodes of the Perfusion workflows lie, and what their notes say; see draw_workflows.py."""

NOTE_SIZES = {"perfusion_train_concept": (420, 240), "perfusion_two_concepts": (340, 185)}
NOTES = {
    "perfusion_train_concept": """**Teach a concept of 100 KB**

1. Drop 4 to 8 pictures on the Training Picture nodes. Transparent backgrounds are left out of what is learned.
2. Name the token and the superclass word in Personalization Dataset, such as `<teddy>` and teddy.
3. Choose your checkpoint, and as *covariance_name* the authors' C_inv.npy or a file from *Estimate Text Covariance*.
4. Press Run.

The concept goes to *models/perfusion_concepts* as *my_teddy*. Press R, then open the template \
*perfusion_two_concepts*.""",
    "perfusion_two_concepts": """**Two concepts in one picture**

1. Choose the checkpoint that you trained on, and two concepts trained with one covariance.
2. Write the prompt: `{1}` is the first concept's word, `{2}` the second's.
3. A lower *beta* brings a concept closer to its pictures.""",
}
NOTE = 0
LAYOUTS: dict[str, list[tuple[str, list[list[int]]]]] = {
    "perfusion_train_concept": [
        ("Pictures and base model", [[1, 3], [2, 4], [5, 6]]),
        ("Training", [[7]]),
        ("Result", [[9, 8, NOTE]]),
    ],
    "perfusion_two_concepts": [
        ("Model", [[1, 2, 3, NOTE]]),
        ("Sampling", [[4, 5]]),
        ("Result", [[6, 7]]),
    ],
}
