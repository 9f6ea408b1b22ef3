"""Where the nodes of the workflows that make a face encoder lie, and what their notes say; see draw_workflows.py."""

NOTE_SIZES = {
    "lookahead_generate_identities": (340, 330),
    "lookahead_train_encoder": (310, 400),
    "lookahead_validate_encoder": (340, 270),
}
NOTES = {
    "lookahead_generate_identities": """**People who do not exist, for training an encoder**

1. Choose SDXL Turbo, or another SDXL model made for one step.
2. Write names or prompts of your own, or keep the shipped ones.
3. Queue once: 16 pictures. If you like them, queue as often as you like, 500 times for all 8,000.

Each run goes on where the last one ended. Cancel whenever you want, and queue again later: what is there stays.

A name gets nearly the same face in all its pictures; that is what the encoder learns from. Then open the template \
*lookahead_train_encoder*.""",
    "lookahead_train_encoder": """**A face encoder of your own**

1. Make a set of people with *lookahead_generate_identities*, and press R.
2. Choose SDXL, ip-adapter-plus-face for SDXL, CLIP-ViT-H, the LCM LoRA for SDXL, model_ir_se50.pth and a folder with \
networks that find faces.
3. Queue. The authors train 5,000 iterations, which take two steps each.

Cancel saves the encoder as it is; *resume* goes on from there.

By count this takes 21 GB at 1024 pixels with a TAESD for SDXL, from *models/vae*, as *preview_vae_name*. \
Out of memory? Lower *batch_size*: at 1 it takes 17 GB.

The file is *my_encoder*: press R, then open *lookahead_validate_encoder*.""",
    "lookahead_validate_encoder": """**How good is the encoder?**

1. Choose the SDXL checkpoint, your encoder, and CLIP-ViT-H.
2. Drop a photo of somebody the encoder was not trained on.
3. Queue, and note the scores: *face* is the likeness.
4. Choose the encoder that training started from, and queue again with the same seed.

Likeness should rise, and the styles should stay. For CLIP-T, how well prompts are followed, choose a *clip_folder* \
and disconnect *clip_vision*.""",
}
NOTE = 0
LAYOUTS: dict[str, list[tuple[str, list[list[int]]]]] = {
    "lookahead_generate_identities": [
        ("Model", [[1, NOTE]]),
        ("People and prompts", [[2]]),
        ("Sampling", [[3, 4, 5], [6, 7]]),
        ("Result", [[8]]),
    ],
    "lookahead_train_encoder": [
        ("Model", [[1, NOTE]]),
        ("Training", [[2]]),
        ("Result", [[3, 4]]),
    ],
    "lookahead_validate_encoder": [
        ("Model", [[1, 2, NOTE]]),
        ("Face", [[3, 4, 5]]),
        ("Prompts", [[6, 7, 8, 9, 10]]),
        ("Sampling", [[11]]),
        ("Result", [[12, 13], [14, 15]]),
    ],
}
