from setuptools import setup

setup(
    name="salmon-revsmtp-spool",
    version="1.0",
    py_modules=["salmon_revsmtp_spool"],
    install_requires=["salmon-revsmtp"],
    entry_points={"salmon_revsmtp": ["spool = salmon_revsmtp_spool"]},
)
