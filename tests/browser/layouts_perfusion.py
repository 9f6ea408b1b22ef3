"""Where the nodes of the Perfusion workflows lie, and what their notes say; see draw_workflows.py."""

NOTE_SIZES = {
    "perfusion_train_concept": (420, 240),
    "perfusion_train_with_masks": (420, 300),
    "perfusion_two_concepts": (340, 185),
    "perfusion_global_locking": (340, 230),
    "perfusion_balance": (340, 290),
}
NOTES = {
    "perfusion_train_concept": """**Teach a concept of 40 KB (SDXL: 200 KB)**

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
    "perfusion_train_with_masks": """**Learn from the subject, not from its surroundings**

1. Put CLIPSeg (CIDAS/clipseg-rd64-refined) into *models/clipseg/clipseg-rd64-refined* and press R.
2. Drop 4 to 8 pictures on the Training Picture nodes, and name their *subject* in ordinary words.
3. Choose your checkpoint and the covariance, as in the template *perfusion_train_concept*.
4. Press Run. Look at *Masks*: the subject should be bright. Where it is not, name it otherwise.

Training counts each pixel as much as the mask says. The concept goes to *models/perfusion_concepts* as \
*my_masked_teddy*.""",
    "perfusion_global_locking": """**Freer poses by global key locking**

1. Choose the checkpoint that you trained on, and the concept.
2. Write the same text into both prompts.
3. Press Run: the first picture is without global locking, the second with it.

With global locking, keys read the prompt with the superclass word, so the concept goes where a plain teddy would: \
actions and poses follow the prompt more. Likeness may suffer a little.""",
    "perfusion_balance": """**Which beta and tau?**

1. Put a CLIP (openai/clip-vit-large-patch14) into *models/scoring/clip-vit-large-patch14* and press R.
2. Choose the checkpoint and the concept, and drop its training pictures on the Training Picture nodes.
3. Press Run: every pair of *betas* and *taus* is sampled and scored. The framed row of the contact sheet is the \
most balanced one.
4. Copy its *beta* and *tau* into Load Perfusion Concept.

This makes 96 pictures; try fewer values first.""",
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
    "perfusion_train_with_masks": [
        ("Pictures", [[1, 3], [2, 4]]),
        ("Masks", [[5, 9, 10]]),
        ("Dataset and base model", [[6, 7]]),
        ("Training", [[8]]),
        ("Result", [[12, 11, NOTE]]),
    ],
    "perfusion_global_locking": [
        ("Model", [[1, 2, 3, NOTE]]),
        ("Prompts", [[4, 5, 6, 7]]),
        ("Sampling", [[8], [9]]),
        ("Result", [[10, 11, 12]]),
    ],
    "perfusion_balance": [
        ("Model", [[1, 2, 7, NOTE]]),
        ("Training pictures", [[3, 5], [4, 6]]),
        ("Sweep", [[8]]),
        ("Result", [[9, 10]]),
    ],
}
