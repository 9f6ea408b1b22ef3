"""The recipes that the command line knows; a literal table that imports nothing."""

RECIPES = {
    "dco": "dco.train",
    "dco-sample": "dco.sample",
    "textual-inversion": "dvar.textual_inversion",
    "dreambooth": "dvar.dreambooth",
    "custom-diffusion": "dvar.custom_diffusion",
    "merge-custom-diffusion": "dvar.merge",
    "lookahead": "lookahead.train",
    "lookahead-export": "lookahead.export",
    "perfusion": "perfusion.train",
    "perfusion-covariance": "perfusion.covariance",
}
