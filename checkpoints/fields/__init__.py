"""Fields of released configs: `config_fields.py` reads them one by one and refuses the others,
`harmless.py` lists those that never change a result, and the other files read fields that several
families share.
"""
