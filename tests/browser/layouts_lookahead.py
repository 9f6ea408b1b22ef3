"""Where the nodes of the LCM-Lookahead workflows lie, and what their notes say; see draw_workflows.py."""

NOTE_SIZES = {
    "lookahead_face_to_portrait": (340, 210),
    "lookahead_fast_portrait": (340, 180),
    "lookahead_few_steps": (340, 165),
    "lookahead_style_grid": (340, 150),
    "lookahead_saved_identity": (340, 185),
    "lookahead_preview_guidance": (340, 215),
}
NOTES = {
    "lookahead_face_to_portrait": """**A face in any style, without training**

1. Choose an SDXL checkpoint, the encoder from *Convert Lookahead Checkpoint*, and CLIP-ViT-H.
2. Drop a photo that the face fills for a good part.
3. Write what you want to see: "a face", no name.

Not alike enough? Raise *identity_scale*. Too close to the photo? Lower it, or *adapter_scale*.

The face is saved as *my_face*: press R, then open the template *lookahead_saved_identity*.""",
    "lookahead_fast_portrait": """**A face, as fast as any picture**

1. Choose an SDXL checkpoint, an encoder, and CLIP-ViT-H. An ip-adapter-plus-face file for SDXL is an encoder, too.
2. Drop a photo that the face fills for a good part.
3. Write what you want to see.

For the closest likeness take *lookahead_face_to_portrait*.""",
    "lookahead_few_steps": """**A face in six steps**

1. Choose an SDXL checkpoint, the encoder, the LCM LoRA for SDXL, and CLIP-ViT-H.
2. Drop a photo that the face fills for a good part.
3. Write what you want to see. With *few_step* on, the scales of the guidance do nothing: \
*adapter_scale* and *sharing_strength* set the likeness.""",
    "lookahead_style_grid": """**One face, a style for each line**

1. Choose an SDXL checkpoint, the encoder, and CLIP-ViT-H.
2. Drop a photo that the face fills for a good part.
3. Write one prompt a line; each line makes a picture. Fewer lines need less memory.""",
    "lookahead_saved_identity": """**A face that you saved, again**

1. Choose the checkpoint, and the encoder that saved the face.
2. Choose the face. *lookahead_face_to_portrait* saves one, as *my_face*.
3. Write what you want to see.

No photo and no CLIP-Vision are needed. *end_percent* 0.6 saves time: from there on no attention is \
shared. Set 1 for the closest likeness.""",
    "lookahead_preview_guidance": """**Closer to a picture, without training**

1. Choose an SDXL checkpoint, the LCM LoRA for SDXL, and a CLIP-ViT.
2. Drop a picture whose subject or mood you like, and write the prompt.
3. *scale* sets how far each step pulls.

Out of memory? Put *taesdxl_decoder* into *models/vae_approx* and disconnect *vae*: previews then \
need next to none.""",
}
NOTE = 0
LAYOUTS: dict[str, list[tuple[str, list[list[int]]]]] = {
    "lookahead_face_to_portrait": [
        ("Model", [[1, 2, 3, NOTE]]),
        ("Face", [[4, 5, 6, 7]]),
        ("Prompts", [[8, 9, 10]]),
        ("Sampling", [[11], [12, 13, 14, 15]]),
        ("Result", [[16, 17, 18]]),
    ],
    "lookahead_fast_portrait": [
        ("Model", [[1, 2, NOTE]]),
        ("Face", [[3, 4, 5]]),
        ("Prompts", [[6, 7, 8]]),
        ("Sampling", [[9]]),
        ("Result", [[10, 11]]),
    ],
    "lookahead_few_steps": [
        ("Model", [[1, 2, 3, 4, NOTE]]),
        ("Face", [[5, 6, 7]]),
        ("Prompts", [[8, 9, 10, 11]]),
        ("Sampling", [[12]]),
        ("Result", [[13, 14]]),
    ],
    "lookahead_style_grid": [
        ("Model", [[1, 2, NOTE]]),
        ("Face", [[3, 4, 5]]),
        ("Prompts", [[6, 7, 8, 9]]),
        ("Sampling", [[10]]),
        ("Result", [[11, 12]]),
    ],
    "lookahead_saved_identity": [
        ("Model and face", [[1, 2, 3, NOTE]]),
        ("Prompts", [[4, 5, 6, 7]]),
        ("Sampling", [[8]]),
        ("Result", [[9, 10]]),
    ],
    "lookahead_preview_guidance": [
        ("Model", [[1, NOTE]]),
        ("Picture to follow", [[2, 3, 4]]),
        ("Prompts", [[5, 6]]),
        ("Sampling", [[7, 8], [9, 10, 11, 12]]),
        ("Result", [[13, 14, 15]]),
    ],
}
