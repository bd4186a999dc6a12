"""The command line of each verb of `llava-lite`; reading its flags imports no torch."""
