from flask import Flask, jsonify
from flask_sqlalchemy import SQLAlchemy

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///tickets.sqlite3"  # in the folder "instance"
# pool_pre_ping: a connection that has died meanwhile is replaced.  timeout: seconds to wait for
# the other process (SQLite).
app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
    "pool_pre_ping": True,
    "connect_args": {"timeout": 20},
}
db = SQLAlchemy(app)


class Ticket(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    sender = db.Column(db.Text, nullable=False)
    subject = db.Column(db.Text, nullable=False)
    original = db.Column(db.LargeBinary, nullable=False)


@app.get("/tickets/")
def tickets():
    found = db.session.scalars(db.select(Ticket).order_by(Ticket.id))
    return jsonify(
        tickets=[{"number": one.id, "from": one.sender, "subject": one.subject} for one in found]
    )
