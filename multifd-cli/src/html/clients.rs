//! The clients of a server, on the page about it.

use serde_json::{Map, Value};

use super::{chart::bars, escaped, number, text};
use crate::table;

/// A picture and a table of the clients.
pub(super) fn clients(report: &Map<String, Value>) -> String {
    let Some(list) = report.get("clients").and_then(Value::as_array) else { return String::new() };
    let clients: Vec<&Map<String, Value>> = list.iter().filter_map(Value::as_object).collect();
    let names: Vec<String> =
        clients.iter().map(|client| number(client, "client").unwrap_or_default().to_string()).collect();
    let times: Vec<f64> = clients.iter().map(|client| postcopy(client, "resume-time").unwrap_or_default()).collect();
    let chart = if clients.is_empty() {
        String::new()
    } else {
        bars("From the connection until the VM was told to run", &names, &times, table::milliseconds)
    };
    let rows: String = clients.iter().map(|client| row(client)).collect();
    let left_out = match number(report, "clients-left-out") {
        Some(left_out) if left_out > 0.0 => {
            format!("<p>{} clients between the first and the last are left out.</p>", table::grouped(left_out as u64))
        }
        _ => String::new(),
    };
    format!(
        "<section><h2>Clients</h2>\n<p>{}</p>{chart}{left_out}<table><tr><th>client</th><th>peer</th><th>status</th>\
         <th>told to run after</th><th>requests</th><th>longest answer</th><th>bytes</th><th>error</th></tr>\n{rows}</table></section>\n",
        text(report, "summary"),
    )
}

fn row(client: &Map<String, Value>) -> String {
    let latency = client.get("postcopy").and_then(|postcopy| postcopy["request-latency-us"]["max"].as_f64());
    let bytes = client.get("ram").and_then(|ram| ram["transferred"].as_u64());
    let cells = [
        number(client, "client").map_or_else(String::new, |client| client.to_string()),
        text(client, "peer"),
        text(client, "status"),
        postcopy(client, "resume-time").map_or_else(String::new, table::milliseconds),
        postcopy(client, "requests").map_or_else(String::new, |requests| table::grouped(requests as u64)),
        latency.map_or_else(String::new, |us| table::milliseconds(us / 1e3)),
        bytes.map_or_else(String::new, table::bytes),
        escaped(client.get("error").and_then(Value::as_str).unwrap_or_default()),
    ];
    format!("<tr><td>{}</td></tr>\n", cells.join("</td><td>"))
}

fn postcopy(client: &Map<String, Value>, name: &str) -> Option<f64> {
    client.get("postcopy").and_then(Value::as_object).and_then(|postcopy| number(postcopy, name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_client_has_a_row_and_what_it_says_is_text() {
        let client = json!({ "client": 1, "peer": "<b>", "status": "completed", "ram": { "transferred": 4096 },
            "postcopy": { "resume-time": 1.5, "requests": 1234, "request-latency-us": { "max": 2500 } } });
        let refused = json!({ "client": 2, "status": "failed", "error": "full & gone" });
        let report = json!({ "summary": "served 1 VM", "clients": [client, refused], "clients-left-out": 7 });
        let page = clients(report.as_object().unwrap());
        for part in ["&lt;b&gt;", "1.5 ms", "1,234", "2.5 ms", "4.0 KiB", "full &amp; gone", "7 clients", "served 1 VM"]
        {
            assert!(page.contains(part), "{part}: {page}");
        }
        assert_eq!(page.matches("<tr>").count(), 3);
        assert_eq!(clients(json!({}).as_object().unwrap()), "");
    }
}
