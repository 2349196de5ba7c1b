from pathlib import Path

from setuptools import find_packages, setup

POSTGRES = ["psycopg[binary,pool]>=3.2"]
CONSOLE = ["jinja2>=3.1", "prometheus-client>=0.20", "starlette>=0.40", "uvicorn>=0.30"]

setup(
    name="salmon-revsmtp",
    version="0.1.0",
    description="Reverse SMTP for Salmon: mail behind NAT by ODMR (RFC 2645), both ends",
    long_description=Path(__file__).with_name("README.rst").read_text(encoding="utf-8"),
    long_description_content_type="text/x-rst",
    license="GPL-3.0-or-later",
    license_files=["LICENSE"],
    keywords="smtp odmr atrn mail salmon",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Framework :: AsyncIO",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Communications :: Email :: Mail Transport Agents",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["salmon_revsmtp", "salmon_revsmtp.*"]),
        # The runnable project of config/ and app/ goes along, for `salmon-revsmtp demo`.
        "salmon_revsmtp.demo.project.config",
        "salmon_revsmtp.demo.project.app",
        "salmon_revsmtp.demo.project.app.handlers",
    ],
    package_dir={
        "salmon_revsmtp.demo.project.config": "config",
        "salmon_revsmtp.demo.project.app": "app",
        "salmon_revsmtp.demo.project.app.handlers": "app/handlers",
    },
    package_data={
        "salmon_revsmtp": ["py.typed"],
        "salmon_revsmtp.console": ["templates/*", "static/*"],
        "salmon_revsmtp.demo": ["*.pem"],
        "salmon_revsmtp.init": ["templates/*"],
        "salmon_revsmtp.demo.project.config": ["*.conf"],
    },
    install_requires=[
        "aiosmtplib>=5.1",
        "click>=8.1",
        "dnspython>=2.1",  # it comes with Salmon
        "pluggy>=1.5",
        "pydantic>=2.8",
        "python-dotenv>=1.0",
        "rich>=13",
        "salmon-mail>=3.3,<4",
        "scramp>=1.4.10",
    ],
    extras_require={
        "dev": [
            "axe-playwright-python>=0.1.4",  # axe-core, which the browser runs
            "build",
            *CONSOLE,
            "coverage>=7.10.4",
            "hypothesis",
            "import-linter>=2.5",
            "mypy",
            "playwright>=1.48",  # it drives Debian's Chromium; no browser is downloaded
            *POSTGRES,
            "pytest",
            "pytest-xdist",
            "ruff",
            "setuptools>=70",
            "sphinx",
            "trustme",
            "types-docutils",
        ],
        # A console to look at, and metrics.
        "console": CONSOLE,
        # A hold store in a database: hold = "postgresql://...".
        "postgres": POSTGRES,
        # Wheels are what there is; elsewhere `make fuzz` makes do with hypothesis.
        "fuzz": [
            "atheris>=2.3; sys_platform == 'linux' and platform_machine == 'x86_64'"
            " and python_version < '3.15'",
        ],
    },
    entry_points={
        "console_scripts": ["salmon-revsmtp = salmon_revsmtp.cli.main:main"],
        "salmon_revsmtp": [
            "alert = salmon_revsmtp.alert",
            "console = salmon_revsmtp.console",
            "etrn = salmon_revsmtp.plugins.builtin:etrn",
            "metrics = salmon_revsmtp.metrics",
            "odmr = salmon_revsmtp.plugins.builtin:odmr",
            "postgres = salmon_revsmtp.plugins.builtin:postgres",
        ],
    },
)
